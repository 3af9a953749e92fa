"""What a claim must pass: the same analysis of models and answers with nothing to find, natural states, other edits."""
