"""The version that the package and its records carry."""

VERSION = "0.1.0"
