"""`python demo`: runs the demo."""

if __name__ == "__main__":
    from mount import run

    raise SystemExit(run("run"))
