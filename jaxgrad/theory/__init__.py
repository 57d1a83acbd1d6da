"""Exact predictions, to draw beside what was measured.

    least_squares   GD path and steps to a target; SGD's expected loss, floor, stability edge, spread
    reshuffling     the same for a reshuffled pass, whose steps are not independent
    escape          certified bounds on the probability of leaving a basin
    conditioning    eigen-directions, Jacobi scaling, what adaptive methods can and cannot see
    stopping        when the lecture's stopping rule fires, and how wrong it is then
    cost            operations counted from the traced program

Everything is float64 NumPy on the host, whatever JAX's switches say. Predictions are for the finite data set
at hand: no assumption on the distribution of the data, no small-step limit unless a name says `leading`.
"""
