"""[agent] A group of processes, one per GPU: started, given jobs, ended with ComfyUI."""
