"""``python -m metquay_proxy`` is the same as ``metquay-proxy``."""

from metquay_proxy.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
