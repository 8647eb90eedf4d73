"""The estimate in C: its arithmetic is that of doubles, as Python's is, to the bit."""

cimport cython
cimport libc.math as math

cdef double _FEWEST_BYTES, _MOST_BYTES, _QUANTILE, _PRIOR_TOKENS, _DECAY, _STEP, _PRIOR_DEVIATION, _DEVIATIONS
cdef int _WARM_OUTPUTS, _PRIOR_OUTPUTS
cdef Traffic _COLD


@cython.final
cdef class Traffic:
    cdef readonly long long output_tokens
    cdef double _bytes
    cdef double _tokens
    cdef double _log_output
    cdef double _log_prior
    cdef double _log_mean
    cdef double _log_squares
    cdef long _seen

    cpdef double bytes_per_token(self) noexcept
    cdef void learn_prompt(self, long long text_bytes, long long tokens) noexcept
    @cython.locals(log=double, distance=double, over=bint)
    cdef void learn_output(self, long long tokens) noexcept
    @cython.locals(prior=double, count=double, gap=double, mean=double, squares=double)
    cdef double _warm_output(self) noexcept


cdef class Estimator:
    cdef readonly dict _models
    cdef readonly dict _users

    @cython.locals(traffic=Traffic, prompt="long long", output="long long")
    cpdef estimate(self, model, user, long long text_bytes, long long extra_tokens, long long choices, output_cap)
    @cython.locals(whole=Traffic, own=Traffic, traffic=Traffic)
    cpdef learn(self, model, user, long long text_bytes, long long prompt_tokens, long long choices,
                long long output_tokens)


cdef long long _whole(double amount) noexcept
@cython.locals(traffic=Traffic)
cdef Traffic _remembered(dict traffics, key, Traffic like)
