"""What people edit: documents of devices and of all that devices need.

| file | what |
|---|---|
| device.py | the documents as workers get them |
| documents.py | the same as people write them: kinds, shapes, what names a document |
| checks.py | a collection of documents, and all that is wrong with it |
| changes.py | what changes between two versions of a document |

May import the domain and `preservarium.errors`.
"""
