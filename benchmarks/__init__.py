"""One module per question, and the tools that questions share; results/ holds what was measured, on what device and when."""
