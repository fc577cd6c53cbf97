"""What the stages share."""

VERSION = "0.1.0"
