"""What is measured, and the code that measures it."""
