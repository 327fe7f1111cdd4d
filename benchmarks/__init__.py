"""One file per question; results/ holds what was measured, where and when."""
