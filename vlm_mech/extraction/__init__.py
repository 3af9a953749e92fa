"""Hidden states over a data set, streamed into files and opened without the model."""
