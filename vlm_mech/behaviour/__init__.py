"""What does the whole model answer? One folder a question, each with the same anatomy."""
