"""`python demo`: runs the demo."""

if __name__ == "__main__":
    from start import run

    raise SystemExit(run("show"))
