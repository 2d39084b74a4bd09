"""A small compiler: it turns the torch operations of a merge method into one loop over a block, in machine code.

Run one after the other, each operation of a method reads and writes whole blocks, and most of the time goes to memory.
Here the operations of a block become one loop that reads every input once and writes every result once:

1. `trace`: the method runs once on a few elements, and its operations are recorded as a graph (`graph`).
2. `lower`: the graph is divided. Operations on parameters alone run in torch, once per tensor (the prologue). Operations
   on elements become loops, split where a row must be complete before the next step, or where an operation is none that
   loops know, such as a sort; these run in torch, between the loops.
3. `emit`: a loop becomes LLVM instructions on vectors of 16 elements. `arithmetic` says which instructions compute an
   operation of torch; `vectors` holds the types and their conversions.
4. `machine`: LLVM makes machine code from that, inside this process, within some ten milliseconds.
5. `run`: the prologue, then the loops and the operations between them, for each block.

The results have the bits of torch, except for the last bits of sums: these add 16 partial sums, in the same order on every
processor.
"""
