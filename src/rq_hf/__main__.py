"""`python -m rq_hf`: the command line `rq-hf`."""

from rq_hf_cli import main

if __name__ == "__main__":
    main()
