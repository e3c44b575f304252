"""`python -m experiments.coverage`, see `experiments.coverage.study`."""

from experiments.coverage.study import main

if __name__ == "__main__":
    main()
