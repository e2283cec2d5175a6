"""Running a job: the launcher in ComfyUI, torchrun's agent, and the ranks."""
