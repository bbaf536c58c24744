/* C interface of the kernels: plain structs of sizes and device pointers, one launcher an operator.
 *
 * All tensors are dense and in the order of the ONNX operators (token-major). Every function returns a cudaError_t as
 * int, 0 for success, and only enqueues work on the stream: no allocation, no synchronisation, no host read of device
 * data, so each may be captured in a CUDA graph. A state may go out into the buffer it came in from, or another.
 * Row b uses its first seq_lens[b] tokens; y past them is written as zero.
 */
#ifndef MAMBA_KERNELS_H
#define MAMBA_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of activations T and states S. Arithmetic is float32 whatever they are. */
enum { MAMBA_FLOAT32 = 0, MAMBA_FLOAT16 = 1, MAMBA_BFLOAT16 = 2 };

enum { MAMBA_ACTIVATION_NONE = 0, MAMBA_ACTIVATION_SILU = 1 };

typedef struct MambaCausalConv1d {
    int32_t batch, length, channels, width; /* B, L, C, K (2 to 8) */
    int32_t dtype, activation;
    const void* x;           /* [B, L, C] T */
    const void* weight;      /* [C, K] T */
    const void* bias;        /* [C] T, or null */
    const void* conv_state;  /* [B, C, K-1] T, oldest first */
    const int32_t* seq_lens; /* [B] */
    void* y;                 /* [B, L, C] T */
    void* conv_state_out;    /* [B, C, K-1] T */
} MambaCausalConv1d;

typedef struct MambaSelectiveScan {
    int32_t batch, length, channels, state_size; /* B, L, D, N (1 to 256) */
    int32_t dtype, state_dtype, dt_softplus;
    const void* x;           /* [B, L, D] T */
    const void* dt;          /* [B, L, D] T */
    const float* A;          /* [D, N], negative */
    const void* B;           /* [B, L, N] T */
    const void* C;           /* [B, L, N] T */
    const float* D;          /* [D], or null */
    const void* z;           /* [B, L, D] T, or null */
    const float* dt_bias;    /* [D], or null */
    const void* ssm_state;   /* [B, D, N] S */
    const int32_t* seq_lens; /* [B] */
    void* y;                 /* [B, L, D] T */
    void* ssm_state_out;     /* [B, D, N] S */
} MambaSelectiveScan;

typedef struct MambaSsdScan {
    int32_t batch, length, heads, head_dim, state_size, groups; /* B, L, H, P, N (1 to 256), G */
    int32_t dtype, state_dtype, dt_softplus, skip_per_channel;  /* skip_per_channel: D is [H, P], not [H] */
    float dt_min, dt_max;
    const void* x;           /* [B, L, H * P] T */
    const void* dt;          /* [B, L, H] T */
    const float* A;          /* [H], negative */
    const void* B;           /* [B, L, G * N] T */
    const void* C;           /* [B, L, G * N] T */
    const float* D;          /* [H] or [H, P], or null */
    const float* dt_bias;    /* [H], or null */
    const void* ssm_state;   /* [B, H, P, N] S */
    const int32_t* seq_lens; /* [B] */
    void* y;                 /* [B, L, H * P] T */
    void* ssm_state_out;     /* [B, H, P, N] S */
} MambaSsdScan;

typedef struct MambaLastToken {
    int32_t batch, length, width; /* B, L, d */
    int32_t dtype;
    const void* x;           /* [B, L, d] T */
    const int32_t* seq_lens; /* [B] */
    void* y;                 /* [B, d] T */
} MambaLastToken;

/* A layer's step of one token a row in three or four parts, L = 1 in each. Weights are [inputs, outputs], at addresses and
 * of rows that are multiples of 16 bytes; d and D are at most some thousands, for a row of x lies in shared memory. On compute
 * capability 9.0 and newer each part reads its weights, norms and biases while what is before it in the stream still runs:
 * that must not write them. */

/* y = norm(hidden) W + bias; of the columns [conv_first, conv_first + C) the causal convolution, with silu. */
typedef struct MambaInProj {
    int32_t batch, length, width, outputs, channels, conv_width; /* B, 1, d, M, C, K (2 to 8) */
    int32_t dtype, conv_first;
    float eps;
    const float* hidden;      /* [B, 1, d] */
    const float* norm_weight; /* [d] */
    const void* weight;       /* [d, M] T */
    const void* bias;         /* [M] T, or null */
    const void* conv_weight;  /* [C, K] T */
    const void* conv_bias;    /* [C] T, or null */
    const void* conv_state;   /* [B, C, K-1] T, oldest first */
    const int32_t* seq_lens;  /* [B] */
    void* y;                  /* [B, 1, M] T */
    void* conv_state_out;     /* [B, C, K-1] T */
} MambaInProj;

/* y = x W of the first D values of a row. */
typedef struct MambaXProj {
    int32_t batch, length, row, channels, outputs; /* B, 1, X, D, E */
    int32_t dtype;
    const void* x;            /* [B, 1, X] T */
    const void* weight;       /* [D, E] T */
    void* y;                  /* [B, 1, E] T */
} MambaXProj;

/* MambaSelectiveScan with dt = low W: x and z are a row of xz, dt's input, B and C one of low. */
typedef struct MambaSelectiveUpdate {
    int32_t batch, length, row, low_row, rank, channels, state_size; /* B, 1, X = 2 D, E = R + 2 N, R, D, N (1 to 256) */
    int32_t dtype, state_dtype;
    float norm_eps;           /* of a norm of each part of low (Falcon-Mamba); negative: none */
    const void* xz;           /* [B, 1, 2 D] T, x convolved; at a multiple of 16 bytes, like the next two */
    const void* low;          /* [B, 1, R + 2 N] T */
    const void* dt_weight;    /* [R, D] T */
    const float* A;           /* [D, N], negative */
    const float* D;           /* [D], or null */
    const float* dt_bias;     /* [D], or null */
    const void* ssm_state;    /* [B, D, N] S */
    const int32_t* seq_lens;  /* [B] */
    void* y;                  /* [B, 1, D] T, gated */
    void* ssm_state_out;      /* [B, D, N] S */
} MambaSelectiveUpdate;

/* MambaSsdScan from a row of the projection: z, x, B, C and dt side by side, the middle three convolved. */
typedef struct MambaSsdUpdate {
    int32_t batch, length, row, heads, head_dim, state_size, groups; /* B, 1, M = 2 H P + 2 G N + H, H, P, N, G */
    int32_t dtype, state_dtype, dt_softplus, skip_per_channel;
    float dt_min, dt_max;
    const void* projected;    /* [B, 1, M] T */
    const float* A;           /* [H], negative */
    const float* D;           /* [H] or [H, P], or null */
    const float* dt_bias;     /* [H], or null */
    const void* ssm_state;    /* [B, H, P, N] S */
    const int32_t* seq_lens;  /* [B] */
    void* y;                  /* [B, 1, H * P] T, gated */
    void* ssm_state_out;      /* [B, H, P, N] S */
} MambaSsdUpdate;

/* y = residual + norm(x) W + bias, the norm in groups, or x itself. */
typedef struct MambaOutProj {
    int32_t batch, length, channels, width, groups; /* B, 1, D, d, G */
    int32_t dtype;
    float eps;
    const void* x;            /* [B, 1, D] T */
    const float* norm_weight; /* [D], or null */
    const void* weight;       /* [D, d] T */
    const void* bias;         /* [d] T, or null */
    const float* residual;    /* [B, 1, d] */
    float* y;                 /* [B, 1, d] */
} MambaOutProj;

/* y = norm(hidden) W^T, W as an embedding is stored. */
typedef struct MambaHead {
    int32_t batch, length, width, vocab; /* B, 1, d, V */
    int32_t dtype;
    float eps;
    const float* hidden;      /* [B, 1, d] */
    const float* norm_weight; /* [d] */
    const void* weight;       /* [V, d] T */
    float* y;                 /* [B, V] */
} MambaHead;

/* A layer of MambaModel. Weights of products are [inputs, outputs]. D is H P in Mamba-2. */
typedef struct MambaLayer {
    const float* norm_weight;   /* [d] */
    const void* in_proj;        /* [d, M] T; outputs x and z (M = 2 D), or z, x, B, C and dt (M = 2 H P + 2 G N + H) */
    const void* in_proj_bias;   /* [M] T, or null */
    const void* conv_weight;    /* [C, K] T; C = D, or H P + 2 G N */
    const void* conv_bias;      /* [C] T, or null */
    const void* conv_state;     /* [B, C, K-1] T, oldest first */
    const void* x_proj;         /* [D, R + 2 N] T; null in Mamba-2 */
    const void* dt_proj;        /* [R, D] T; null in Mamba-2 */
    const float* A;             /* [D, N], or [H], negative */
    const float* D;             /* [D], or [H] or [H, P]; may be null */
    const float* dt_bias;       /* [D], or [H]; may be null */
    const void* ssm_state;      /* [B, D, N], or [B, H, P, N] S */
    const float* gate_norm;     /* [H P] of Mamba-2's norm of the gated scan, or null */
    const void* out_proj;       /* [D, d] T */
    const void* out_proj_bias;  /* [d] T, or null */
    void* conv_state_out;
    void* ssm_state_out;
} MambaLayer;

/* `pending`, of Mamba-2: tokens that states do not hold yet. Where it and all states go out where they came in, a step of many
 * rows may write a row's states once in some tokens, for states are most of what it moves, and keep the others beside them: see
 * pending.cuh. It is part of the state; zeros are nothing pending. After a call of more tokens than one nothing is, nor in a row
 * that used none in the last call: make such a call to have ssm_state by itself, or to go on with another number of rows. */

/* The whole model: tokens to logits, of the last token that each row uses or of all. Weights of products, the embedding
 * and the head lie at addresses and have rows that are multiples of 16 bytes. An id out of range reads the nearest row. */
typedef struct MambaModel {
    int32_t batch, length, layers, width, outputs, channels, conv_width, inner, state_size; /* B, L, n_layer, d, M, C, K, D, N */
    int32_t rank, heads, head_dim, groups, vocab; /* R (0 in Mamba-2), H and P (0 in Mamba), G, V */
    int32_t dtype, state_dtype, skip_per_channel, all_logits;
    int32_t pending_row;        /* Q, of Mamba-2 with pending; else 0 */
    float eps, norm_eps;        /* of the norms; of Falcon-Mamba's norms in the scan, negative: none */
    float dt_min, dt_max;
    const int32_t* input_ids;   /* [B, L] */
    const int32_t* seq_lens;    /* [B] */
    const void* embedding;      /* [V, d] T */
    const float* norm_weight;   /* [d], before the head */
    const void* head;           /* [V, d] T; the embedding where they are tied */
    const float* pending;       /* [B, Q], or null: states hold all tokens */
    float* logits;              /* [B, V], or [B, L, V] */
    float* pending_out;
    const MambaLayer* each;     /* [n_layer], in host memory, read before the call returns */
} MambaModel;

/* Row b has been sampled i = steps[b] times, to which 1 is added. It reads uniform and writes log at [i % capacity, b],
 * which may lie in host memory that the device sees. A row with a logit that is NaN or infinite has -1 in log and 0 in
 * tokens. What is kept of the vocabulary, and the order of the filters, is that of runtime/sampling.py. */
typedef struct MambaSampleToken {
    int32_t batch, vocab, capacity; /* B, V (1 to 2^20), steps that uniform and log have room for */
    int32_t top_k;                  /* 0: off */
    int32_t endings;                /* ids that end a row */
    float temperature;              /* 0: greedy, the lowest id of equals */
    float top_p, min_p;             /* in (0, 1], 1: off; in [0, 1], 0: off */
    const float* logits;            /* [B, V] */
    const double* uniform;          /* [capacity, B], in [0, 1); may be null where temperature is 0 */
    const int32_t* eos_ids;         /* [endings], or null */
    int32_t* steps;                 /* [B] */
    int32_t* tokens;                /* [B] */
    int32_t* log;                   /* [capacity, B], or null */
    int32_t* seq_lens;              /* [B], or null; a row where it is 0 is left alone, one that ends is set to 0 */
} MambaSampleToken;

/* Bytes of scratch memory, 256-byte aligned, that a call with these sizes and dtypes needs; pointers are not looked at.
 * It never shrinks as length grows. It may as batch grows: with fewer rows a prompt is cut into more parts. */
size_t mamba_causal_conv1d_workspace(const MambaCausalConv1d* call);
size_t mamba_selective_scan_workspace(const MambaSelectiveScan* call);
size_t mamba_ssd_scan_workspace(const MambaSsdScan* call);
size_t mamba_last_token_workspace(const MambaLastToken* call);
size_t mamba_sample_token_workspace(const MambaSampleToken* call);
size_t mamba_in_proj_workspace(const MambaInProj* call);
size_t mamba_x_proj_workspace(const MambaXProj* call);
size_t mamba_selective_update_workspace(const MambaSelectiveUpdate* call);
size_t mamba_ssd_update_workspace(const MambaSsdUpdate* call);
size_t mamba_out_proj_workspace(const MambaOutProj* call);
size_t mamba_head_workspace(const MambaHead* call);
size_t mamba_model_workspace(const MambaModel* call);

/* Q: how many floats a row of pending has, a multiple of 64; 0 of Mamba. batch and length are not looked at. */
int32_t mamba_pending_row(const MambaModel* call);

/* stream is a cudaStream_t. An unknown dtype or a size out of range is cudaErrorInvalidValue. mamba_model() opens cuBLAS for
 * prompts and for many rows, which allocates memory of its own when it is first used in a context; where there is none it
 * is cudaErrorSharedObjectInitFailed. */
int mamba_causal_conv1d(const MambaCausalConv1d* call, void* workspace, void* stream);
int mamba_selective_scan(const MambaSelectiveScan* call, void* workspace, void* stream);
int mamba_ssd_scan(const MambaSsdScan* call, void* workspace, void* stream);
int mamba_last_token(const MambaLastToken* call, void* workspace, void* stream);
int mamba_sample_token(const MambaSampleToken* call, void* workspace, void* stream);
int mamba_in_proj(const MambaInProj* call, void* workspace, void* stream);
int mamba_x_proj(const MambaXProj* call, void* workspace, void* stream);
int mamba_selective_update(const MambaSelectiveUpdate* call, void* workspace, void* stream);
int mamba_ssd_update(const MambaSsdUpdate* call, void* workspace, void* stream);
int mamba_out_proj(const MambaOutProj* call, void* workspace, void* stream);
int mamba_head(const MambaHead* call, void* workspace, void* stream);
int mamba_model(const MambaModel* call, void* workspace, void* stream);

#ifdef __cplusplus
}
#endif

#endif
