/* Trees of blocks: parts that stand in two of them, and the order in which a chain's kernels are multiplied. */
#include "engine_test.h"
#include "reparam/tree.h"

static orepa_tree *conv(int slot, int64_t in, int64_t out, int64_t kernel, int64_t groups) {
  orepa_leaf leaf = {
      .kind = OREPA_LEAF_PARAMETER, .slot = slot, .in = in, .out = out, .groups = groups, .kernel = {kernel, kernel}};
  orepa_tree *tree = orepa_tree_leaf(&leaf);
  assert_non_null(tree);
  return tree;
}

/* Multiplications of composing layers i ... j as a plan says. */
static double planned_cost(const int *cut, int count, orepa_tree *const *layers, int64_t groups, int i, int j,
                           double *area) {
  if (i == j) {
    *area = (double)(layers[i]->kernel[0] * layers[i]->kernel[1]);
    return 0;
  }
  double left, right;
  int m = cut[i * count + j];
  double cost = planned_cost(cut, count, layers, groups, i, m, &left) +
                planned_cost(cut, count, layers, groups, m + 1, j, &right);
  int64_t middle = layers[m + 1]->in / (m + 1 == j ? layers[j]->groups : groups);
  int64_t in = layers[i]->in / (i == m ? layers[i]->groups : groups);
  double edge = sqrt(left) + sqrt(right) - 1; /* kernels are square here */
  *area = edge * edge;
  return cost + (double)(layers[j]->out * middle * in) * left * right;
}

/* The least over all orders, tried one by one. */
static double least_cost(int *cut, int count, orepa_tree *const *layers, int64_t groups, int i, int j) {
  double least = INFINITY, area;
  for (int m = i; m < j; m++) {
    least_cost(cut, count, layers, groups, i, m);
    least_cost(cut, count, layers, groups, m + 1, j);
    int best = cut[i * count + j];
    cut[i * count + j] = m;
    double here = planned_cost(cut, count, layers, groups, i, j, &area);
    if (here < least)
      least = here;
    else
      cut[i * count + j] = best;
  }
  return i == j ? 0 : least;
}

static void the_cheapest_order_is_chosen(void **state) {
  (void)state;
  srand(1);
  int other = 0;
  for (int n = 0; n < 300; n++) {
    orepa_tree *layers[6];
    int count = 2 + rand() % 5, tried[36] = {0};
    int64_t groups = 1 + rand() % 2, channels = groups * (1 + rand() % 8);
    for (int k = 0; k < count; k++) {
      int64_t out = groups * (1 + rand() % 30);
      bool depthwise = rand() % 5 == 0;
      out = depthwise ? channels * (1 + rand() % 3) : out;
      layers[k] = conv(k, channels, out, 1 + 2 * (rand() % 3), depthwise ? channels : groups);
      channels = out;
    }
    int *cut = chain_order(count, layers, groups);
    assert_non_null(cut);
    double area, planned = planned_cost(cut, count, layers, groups, 0, count - 1, &area);
    double least = least_cost(tried, count, layers, groups, 0, count - 1);
    assert_true(fabs(planned - least) <= 1e-9 * least);
    other += cut[count - 1] != count - 2;
    free(cut);
    for (int k = 0; k < count; k++)
      orepa_tree_release(layers[k]);
  }
  assert_true(other > 50); /* not only from left to right */
}

static void a_chain_is_arranged(void **state) {
  (void)state;
  /* 64 -> 64 -> 64 -> 2: the last two first. */
  orepa_tree *chain = orepa_tree_chain(
      3, (orepa_tree *[]){conv(0, 64, 64, 1, 1), conv(1, 64, 64, 3, 1), conv(2, 64, 2, 1, 1)}, 1, true);
  assert_non_null(chain);
  assert_int_equal(chain->count, 2);
  assert_int_equal(chain->children[1]->form, TREE_CHAIN);
  assert_false(chain->children[1]->correlate);
  assert_int_equal(chain->children[1]->count, 2);
  assert_int_equal(chain->kernel[0], 3);
  orepa_tree_release(chain);
}

static orepa_tensor *filled(int64_t out, int64_t in, int64_t kernel) {
  orepa_tensor *t = orepa_randn(OREPA_FLOAT64, orepa_device_by_name("ref"), 4, (int64_t[]){out, in, kernel, kernel});
  assert_non_null(t);
  return t;
}

/* A part that stands in two trees, or twice in one, is a part of each. */
static void parts_may_be_shared(void **state) {
  (void)state;
  orepa_tree *leaf = conv(0, 2, 2, 3, 1),
             *first = orepa_tree_chain(1, (orepa_tree *[]){orepa_tree_retain(leaf)}, 1, false);
  orepa_tree *twice = orepa_tree_chain(2, (orepa_tree *[]){orepa_tree_retain(leaf), orepa_tree_retain(leaf)}, 1, false);
  orepa_tree *sum =
      orepa_tree_sum(2, (orepa_tree *[]){orepa_tree_retain(first), orepa_tree_retain(twice)}, 1, (int64_t[]){5, 5});
  assert_non_null(sum);
  orepa_tensor *w = filled(2, 2, 3);
  done(orepa_set_requires_grad(w, true));
  orepa_tree *trees[] = {first, twice, sum};
  for (int k = 0; k < 3; k++) {
    orepa_tensor *kernel = must(orepa_squeeze(trees[k], 1, &w, NULL));
    assert_non_null(kernel);
    assert_int_equal(orepa_shape(kernel)[2], k ? 5 : 3);
    orepa_tensor *dy = filled(2, 2, k ? 5 : 3);
    done(orepa_backward(kernel, dy, false));
    orepa_release(dy);
    orepa_release(kernel);
  }
  for (int k = 0; k < 3; k++)
    orepa_tree_release(trees[k]);
  orepa_tree_release(leaf);
  orepa_release(w);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_cheapest_order_is_chosen),
      cmocka_unit_test(a_chain_is_arranged),
      cmocka_unit_test(parts_may_be_shared),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
