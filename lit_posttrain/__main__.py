"""``python -m lit_posttrain``."""

from lit_posttrain.cli import main

if __name__ == "__main__":
    main()
