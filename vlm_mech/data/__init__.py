"""What is asked about: counterfactual pairs, generated scenes, pictures with a class."""
