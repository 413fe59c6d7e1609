"""What generates parts of the documentation from the code."""
