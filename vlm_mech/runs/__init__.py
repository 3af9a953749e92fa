"""The contract of every experiment: its options, its folder, its report."""
