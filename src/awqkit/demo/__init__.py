"""The small model that ships inside the wheel, and which text it has never seen."""
