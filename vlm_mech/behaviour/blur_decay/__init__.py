"""The same question on an image that is blurred until there is none."""
