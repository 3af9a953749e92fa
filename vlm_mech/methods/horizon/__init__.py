"""Where the image may go: removed, frozen or exchanged from each layer on, and the first layer from which it may."""
