"""The regulariser inside other training frameworks; each module needs the framework it names."""
