"""The estimate in C: its arithmetic is that of doubles, as Python's is, to the bit."""

cimport cython
cimport libc.math as math

cdef double _TOKEN, _LEAST_FACTOR, _MOST_FACTOR, _QUANTILE, _PRIOR_TOKENS, _DECAY, _STEP, _PRIOR_DEVIATION
cdef double _DEVIATIONS
cdef int _WARM_OUTPUTS, _PRIOR_OUTPUTS
cdef Traffic _COLD


@cython.final
cdef class Traffic:
    cdef readonly long long output_tokens
    cdef double _expected
    cdef double _tokens
    cdef double _log_output
    cdef double _log_prior
    cdef double _log_mean
    cdef double _log_squares
    cdef long _seen

    cpdef double factor(self) noexcept
    cdef void learn(self, long long text_256ths, long long prompt_tokens, double log_answer) noexcept
    cdef void learn_prompt(self, long long text_256ths, long long tokens) noexcept
    @cython.locals(distance=double, over=bint)
    cdef void learn_output(self, double log) noexcept
    @cython.locals(prior=double, count=double, gap=double, mean=double, squares=double)
    cdef double _warm_output(self) noexcept


cdef class Estimator:
    cdef readonly dict _models
    cdef readonly dict _teams
    cdef readonly dict _users

    @cython.locals(traffic=Traffic, prompt="long long", output="long long", answers="long long", most="long long")
    cpdef estimate(
        self, model, team, user, long long text_bytes, long long text_256ths, long long extra_tokens,
        long long choices, output_cap,
    )
    @cython.locals(whole=Traffic, like=Traffic, own=Traffic, log_answer=double)
    cpdef learn(
        self, model, team, user, long long text_256ths, long long prompt_tokens, long long choices,
        long long output_tokens,
    )


cdef long long _whole(double amount) noexcept
@cython.locals(traffic=Traffic)
cdef Traffic _remembered(dict traffics, key, Traffic like)
