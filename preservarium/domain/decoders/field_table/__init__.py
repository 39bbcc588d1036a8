"""Declarative binary field tables: a payload format as data, compiled once to straight Python.

A table is a list of items, read in order from the first byte. docs/FIELD_TABLES.md describes the language for users.

| item | keys |
|------|------|
| field | `name`, `type`, and how the number becomes a value: `scale`, `div`, `offset`, `expr`, `enum`, … |
| computed field | `name`, `expr` over earlier fields and parameters, no `type` |
| group | `when` (a condition), `fields`, optional `else`; `within` (a length in bytes) bounds it |
| repeat | `repeat` (a number, an expression or `end`), `fields`; `i` counts from 0 |
| choice | `switch` (an expression), `cases` (number -> fields), optional `default` |

The compiler checks the whole table first and generates one function: runs of fixed-width fields become one
`struct.unpack_from`, expressions become inlined arithmetic. A generated function holds nothing but names that the compiler made,
`repr()` of constants, and the functions of `expressions.NAMESPACE`.

| file | what |
|---|---|
| language.py | keys, limits, and the checks of single entries |
| layout.py | types: how a field lies in the payload, and how it is unpacked |
| writer.py | the function that is being written: lines, names in scope, the cursor |
| compiler.py | a table to that function |
| runtime.py | what a generated function calls |
| decoder.py | the decoder of a `table` parser |

May import the domain and `preservarium.errors`.
"""
