// Conversations in IndexedDB: larger than localStorage's 5 MB, and written without blocking.

const NAME = "conversations";
let opened = null;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("ktrt", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(NAME, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function inStore(mode, action) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(NAME, mode);
    const request = action(transaction.objectStore(NAME));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

export async function allConversations() {
  const found = await inStore("readonly", (store) => store.getAll());
  return found.sort((one, other) => other.updated - one.updated);
}

export function saveConversation(conversation) {
  return inStore("readwrite", (store) => store.put(conversation));
}

export function deleteConversation(id) {
  return inStore("readwrite", (store) => store.delete(id));
}
