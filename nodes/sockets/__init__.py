"""What other nodes hand on, core's and other packs', -> what a job takes."""
