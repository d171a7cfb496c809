"""`python -m electra_ds` is the `electra-ds` command."""

from electra_ds.cli import main

if __name__ == "__main__":
    main()
