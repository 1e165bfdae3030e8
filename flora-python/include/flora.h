/* flora: linear layers whose rows are adapted by different low-rank adapters in one batch, on your own memory.
 *
 * A function returns FLORA_OK, or a code; flora_last_error() then says what was wrong, where, and how to mend it. A call that failed
 * has changed and written nothing. Every function may be called from any thread at any time; a layer computes for any number of
 * threads at once while adapters come and go. Memory that is passed is read and written while the call runs, and not afterwards.
 */
#ifndef FLORA_H
#define FLORA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum flora_code {
    FLORA_OK = 0,
    FLORA_INVALID = 1, /* what was passed isn't right */
    FLORA_CLOSED = 2,  /* no layer has this handle: it was freed */
    FLORA_FAILED = 3   /* the machine refuses */
};

enum flora_element {
    FLORA_F32 = 0,
    FLORA_F16 = 1,
    FLORA_BF16 = 2,
    FLORA_F64 = 3 /* of an adapter's operands alone */
};

/* A layer. Not a pointer: one that was freed is an error. */
typedef int64_t flora_linear;

/* Up to two extents; strides are in numbers, and may be anything. */
typedef struct flora_tensor {
    const void *data;
    int element; /* of enum flora_element */
    int extents; /* 0, 1 or 2 */
    int64_t shape[2];
    int64_t strides[2];
} flora_tensor;

typedef struct flora_operand {
    const char *name;
    flora_tensor tensor;
} flora_operand;

/* What the last call of this thread that failed said. Valid until this thread's next call that fails. */
const char *flora_last_error(void);

/* How many threads layers compute with; the processors of this process, or the variable FLORA_NUM_THREADS, where nobody says. */
int flora_set_num_threads(int64_t count);

/* Makes a layer of a weight [outputs, inputs], which is packed and not kept, and a bias [outputs] or NULL.
 * parts: part_count sizes of consecutive slices of the outputs that have adapters of their own; part_count 0 is one part.
 * slots: how many slots for adapters there are, numbered from 0. activations: the element of x and y. */
int flora_linear_new(const flora_tensor *weight, const flora_tensor *bias, const int64_t *parts, int64_t part_count,
                     int64_t slots, int activations, flora_linear *layer);

/* Frees a layer. Calls of it that are running end as they would. */
int flora_linear_free(flora_linear layer);

/* Puts an adapter into a slot of one part, in place of what was there. kind: its equation, such as "lora", "dora", "hira", "flora",
 * "flora_mean", "ia3" or "ia3_feedforward". operands: count tensors by the names of the equation: b [inputs, r], a [r, outputs of the
 * part], s [], m [outputs], l [outputs] or [inputs]. */
int flora_linear_put(flora_linear layer, int64_t slot, int64_t part, const char *kind, const flora_operand *operands,
                     int64_t count);

/* The same with a module of an adapter's folder in PEFT's layout, such as "model.layers.0.self_attn.q_proj". */
int flora_linear_put_folder(flora_linear layer, int64_t slot, int64_t part, const char *folder, const char *module);

/* Empties a slot of one part, or of all where part is -1. Its rows are base rows from then on. */
int flora_linear_clear(flora_linear layer, int64_t slot, int64_t part);

/* y [rows, outputs] of x [rows, inputs], whose rows begin so many numbers apart. slots: one for each row; -1, and an empty slot, is the
 * base; NULL: all rows are base rows. y may not overlap x. */
int flora_linear_forward(flora_linear layer, const void *x, int64_t x_stride, const int64_t *slots, int64_t rows, void *y,
                         int64_t y_stride);

#ifdef __cplusplus
}
#endif

#endif
