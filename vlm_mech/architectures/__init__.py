"""What differs between models: where their parts live, what tensors are called, and the class that all fulfil."""
