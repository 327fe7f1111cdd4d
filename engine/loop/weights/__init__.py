"""The fp32 weights of a process, their moving average, and where both lie."""
