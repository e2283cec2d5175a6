"""[ComfyUI] Runs a job: gives it to a group, follows it, says what went wrong, keeps groups warm."""
