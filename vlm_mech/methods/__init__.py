"""Where is the image read, carried, suppressed? One folder a method, each with the same anatomy."""
