"""What tutorial.ipynb needs and does not show: servers, people, checks, pictures."""
