"""How often training text mentions each class."""
