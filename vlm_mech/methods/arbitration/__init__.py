"""Where the prior wins over what a picture shows: in turned attention, a late head, an MLP, a sink, or nowhere."""
