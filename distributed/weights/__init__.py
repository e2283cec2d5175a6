"""[rank] Where weights lie and how they get there: parked in host memory, streamed, read ahead."""
