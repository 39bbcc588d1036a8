"""The archive of raw records: what Kafka deletes after a day, kept in Parquet files.

`archiver` copies, `reading` reads as if Kafka still had it, `checking` verifies files and index, `restoring` brings records to a topic or
another place, `standing` says how it is. Files are `stores/archive_files`, the index is `stores/archive_index`. docs/ARCHIVE.md says
how it is used, docs/decisions/0012-archive.md why it is so.

May import what operations may.
"""
