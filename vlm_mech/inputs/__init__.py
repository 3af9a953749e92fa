"""What goes into a model: images, prompts, batches of a contrastive model, and the spans of tokens they have."""
