// Which device this tab is. The mailbox keeps a message until every device of its recipient has acked it,
// so a page that was a new device at each load would leave devices behind that never ack.

/** The first of this browser's device names that no other tab uses. It stays this tab's. */
export async function pickDevice(randomId) {
  const browser = localStorage.getItem("browser") ?? randomId();
  localStorage.setItem("browser", browser);
  // Without Web Locks (a page that is not from localhost and has no TLS) all tabs are one device.
  if (!navigator.locks) return `web-${browser}`;
  for (let number = 1; ; number += 1) {
    const name = `web-${browser}-${number}`;
    if (await take(name)) return name;
  }
}

/** Hold the lock `name` as long as this page is there. Returns whether it was free. */
function take(name) {
  return new Promise((resolve) => {
    navigator.locks.request(name, { ifAvailable: true }, (lock) => {
      resolve(lock !== null);
      return lock && new Promise(() => {});
    });
  });
}
