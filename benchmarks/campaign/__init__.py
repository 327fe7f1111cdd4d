"""Every number from one machine: the questions in an order, a few minutes at a time, and what they brought."""
