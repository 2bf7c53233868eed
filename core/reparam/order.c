/* order.c: in which order a chain's kernels are multiplied. Composing is associative, its cost is not. */
#include <stdlib.h>

#include "reparam/tree.h"

typedef struct {
  orepa_tree *const *layers;
  int64_t groups;     /* the block's */
  double (*reach)[2]; /* [k]: how much larger the layers before k make a kernel */
} chain_layers;

/* The size of the kernel of layers i ... j. */
static double area(const chain_layers *c, int i, int j) {
  return (1 + c->reach[j + 1][0] - c->reach[i][0]) * (1 + c->reach[j + 1][1] - c->reach[i][1]);
}

/* Inputs of one output: alone a layer has its own groups, more of them the block's. */
static double inputs(const chain_layers *c, int i, int j) {
  return (double)c->layers[i]->in / (double)(i == j ? c->layers[i]->groups : c->groups);
}

/* Multiplications of composing layers i ... m with m + 1 ... j. */
static double product_cost(const chain_layers *c, int i, int m, int j) {
  return (double)c->layers[j]->out * inputs(c, m + 1, j) * area(c, m + 1, j) * inputs(c, i, m) * area(c, i, m);
}

static void plan(const chain_layers *c, int count, double *cost, int *cut) {
  size_t n = (size_t)count;
  for (int length = 2; length <= count; length++)
    for (int i = 0, j = length - 1; j < count; i++, j++) {
      double least = -1;
      for (int m = j - 1; m >= i; m--) { /* from left to right where it costs the same */
        double here =
            cost[(size_t)i * n + (size_t)m] + cost[(size_t)(m + 1) * n + (size_t)j] + product_cost(c, i, m, j);
        if (least < 0 || here < least) {
          least = here;
          cut[(size_t)i * n + (size_t)j] = m;
        }
      }
      cost[(size_t)i * n + (size_t)j] = least;
    }
}

int *chain_order(int count, orepa_tree *const *layers, int64_t groups) {
  size_t n = (size_t)count;
  chain_layers c = {layers, groups, calloc(n + 1, sizeof *c.reach)};
  double *cost = calloc(n * n, sizeof *cost);
  int *cut = calloc(n * n, sizeof *cut);
  if (c.reach && cost && cut) {
    for (int k = 0; k < count; k++)
      for (int d = 0; d < 2; d++)
        c.reach[k + 1][d] = c.reach[k][d] + (double)(layers[k]->kernel[d] - 1);
    plan(&c, count, cost, cut);
  } else {
    error_out_of_memory("out of memory: no room to plan a chain of %d layers", count);
    free(cut);
    cut = NULL;
  }
  free(c.reach);
  free(cost);
  return cut;
}
