"""What single heads do at the last token: which hold one run's answer, look at the picture, or write what is said."""
