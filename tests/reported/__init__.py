"""What people really bring: folders that public reports describe, each built here, small, without torch."""
