"""The methods: schedules, policies, decisions, and the drop section that stands for them. NumPy and SciPy alone."""
