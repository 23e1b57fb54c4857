"""What an optimizer costs: contenders side by side, their floors, and where the time goes."""
