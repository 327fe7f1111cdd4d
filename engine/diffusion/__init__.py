"""The mathematics that all families share: which timesteps are drawn, what is predicted, and what an error counts for."""
