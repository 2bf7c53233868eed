/* worker.h: loaders whose threads run Lua, a state on each. */
#ifndef OREPA_WORKER_H
#define OREPA_WORKER_H

#include "orepa_data.h"
#include "parcel.h"

typedef struct worker_set worker_set;

/* Opens a loader whose batches are parcels. Each thread loads orepa.worker with the paths of L and calls what it gives
 * with the values from `first` to the top. NULL: failed, with a message; a Lua error of memory is possible before
 * anything is opened. The set lives as long as the loader. */
orepa_loader *worker_open(lua_State *L, int first, int threads, int prefetch, worker_set **set);
/* How many samples the dataset has, once the loader is ready; -1 and a message: not all threads say the same. */
int64_t worker_size(const worker_set *set);
/* How many batches the next epoch has. */
void worker_set_batches(worker_set *set, int64_t batches);

#endif
