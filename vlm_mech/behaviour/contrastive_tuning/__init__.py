"""What tuning a contrastive model on captions of relations buys."""
